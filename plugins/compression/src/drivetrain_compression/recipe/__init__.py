"""What a method of compression is, and how several make up a recipe."""
