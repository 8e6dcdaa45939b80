"""Wire code, generated from `proto/loraserve/v1` by `tools/generate_protos.py`; not committed."""
