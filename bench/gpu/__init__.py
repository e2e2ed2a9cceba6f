"""What the Triton kernels do on a GPU: one run of at most eight minutes, rehearsed in the interpreter without one."""
