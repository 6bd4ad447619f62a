"""From result folders to what a person looks at; never loads a model."""
