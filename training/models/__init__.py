"""One file a model; all answer the same question: `logits = model(history, candidates)`."""
