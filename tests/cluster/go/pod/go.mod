module baton.dev/tests/cluster/pod

go 1.25.0
