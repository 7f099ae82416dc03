"""What a package lost against its float model."""
