"""Real tasks, real fine-tunes: the material that Switchyard's demo, tests and benchmarks are made of."""
