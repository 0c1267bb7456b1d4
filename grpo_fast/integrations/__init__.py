"""grpo-fast inside other trainers, one module a host: `trl` imports its host, the others do when
`register()` is called."""
