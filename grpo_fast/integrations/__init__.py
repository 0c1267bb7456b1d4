"""grpo-fast inside other trainers, one module a host; importing one imports no host."""
