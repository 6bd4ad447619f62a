"""From a model to its logs, and from logs to metrics."""
