"""Model -> graph: folded, cast, quantized."""
