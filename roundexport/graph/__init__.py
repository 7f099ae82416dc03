"""The model's own forward as one graph without weights, with placeholders for what a target lowers itself."""
