// The C interface: a pool, packing, and programs. A program is the list of a model's operations, made once; one call
// runs it for a step, so that Python's lock is given up and taken back once per step and not once per operation.
#include <memory>
#include <new>

#include "attention.hpp"
#include "elementwise.hpp"
#include "gemm.hpp"
#include "sampling.hpp"

using namespace baton;

namespace {

enum class Kind : int64_t { kEmbed = 0, kRmsNorm = 1, kLinear = 2, kRopeWrite = 3, kAttention = 4 };

struct Op {  // mirrors program.py
  Kind kind;
  int64_t rows;  // 0: one per token, 1: one per sampled row (RMSNorm then gathers its input by sampled_rows)
  void* pointers[6];
  int64_t numbers[12];
  double reals[2];
};

struct Context {
  explicit Context(int threads) : pool(threads), samplers(size_t(pool.num_threads())) {}
  Pool pool;
  AttentionPlan attention;
  std::vector<RowSampler> samplers;
};

KvCache kv_cache(const Op& op) {
  return {static_cast<float*>(op.pointers[0]), op.numbers[0], op.numbers[1], op.numbers[2], op.numbers[3],
          op.numbers[4]};
}

void run_op(Context& context, const Op& op, const Step& step) {
  void* const* p = op.pointers;
  const int64_t* n = op.numbers;
  const int64_t rows = op.rows == 0 ? step.num_tokens : step.num_sampled;
  auto f = [&](int i) { return static_cast<float*>(p[i]); };
  switch (op.kind) {
    case Kind::kEmbed:
      return embed(context.pool, {p[0], f(1), n[0], n[1], n[2] != 0}, step);
    case Kind::kRmsNorm:
      return rms_norm(context.pool, {f(0), n[0], f(1), f(2), n[1], n[2], float(op.reals[0])}, rows,
                      op.rows == 0 ? nullptr : step.sampled_rows);
    case Kind::kLinear:
      return gemm(context.pool, {f(0), n[0], p[1], f(2), f(3), n[1], n[2], n[3], Epilogue(n[4]), n[5] != 0}, rows);
    case Kind::kRopeWrite:
      return rope_write(context.pool,
                        {f(1), n[5], f(2), f(3), kv_cache(op), n[6], n[7], n[8], n[9], float(op.reals[0])}, step);
    case Kind::kAttention:
      return context.attention.run(context.pool,
                                   {f(1), n[5], f(2), n[10], kv_cache(op), n[6], n[7], n[8], n[9], float(op.reals[0])},
                                   step);
  }
}

}  // namespace

extern "C" {

void* baton_open(int32_t num_threads) { return new (std::nothrow) Context(num_threads); }

void baton_close(void* context) { delete static_cast<Context*>(context); }

int32_t baton_vector_width() { return kWidth; }

int32_t baton_panel() { return kPanel; }

void baton_pack(void* context, void* panels, const float* source, int64_t lds, int64_t rows, int64_t k, int64_t offset,
                int64_t interleave, int32_t half) {
  auto* c = static_cast<Context*>(context);
  std::lock_guard<std::mutex> lock(c->pool.exclusive());
  if (half)
    pack(c->pool, static_cast<uint16_t*>(panels), source, lds, rows, k, offset, interleave);
  else
    pack(c->pool, static_cast<float*>(panels), source, lds, rows, k, offset, interleave);
}

void baton_run(void* context, const Op* ops, int64_t num_ops, const Step* step) {
  auto* c = static_cast<Context*>(context);
  std::lock_guard<std::mutex> lock(c->pool.exclusive());
  bool planned = false;
  for (int64_t i = 0; i < num_ops; ++i) {
    if (ops[i].kind == Kind::kAttention && !planned) {
      const int64_t* n = ops[i].numbers;
      c->attention.build(*step, n[7], n[8], n[9], c->pool.num_threads());
      planned = true;
    }
    run_op(*c, ops[i], *step);
  }
}

void baton_sample(void* context, const Sampling* op) {
  auto* c = static_cast<Context*>(context);
  std::lock_guard<std::mutex> lock(c->pool.exclusive());
  auto body = [&](int64_t i, int thread) { c->samplers[size_t(thread)].run(*op, i); };
  c->pool.run(op->num_rows, body);
}

}  // extern "C"
