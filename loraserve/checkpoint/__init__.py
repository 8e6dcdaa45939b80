"""Hugging Face and PEFT directories: configs, safetensors headers, tensor views."""
