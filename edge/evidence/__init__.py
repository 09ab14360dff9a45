"""One small adapter per source of evidence; each yields edge.core.model.Event."""
