"""What a person asks for: recipes, data, training, evaluation, the command line."""
