"""What was made, at what loss and speed, for people: one HTML file, and the model card in a package."""
