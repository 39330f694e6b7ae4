"""DeepSpeed engines: one model under one engine, and the named set of them."""
