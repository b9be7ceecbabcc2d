"""What the models learn from: text, images, tables, synthetic tasks."""
