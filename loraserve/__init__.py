"""LoRAServe: multi-LoRA inference at cost proportional to each adapter's own rank."""
