"""How engines store quantized linear layers: one module for each layout."""
