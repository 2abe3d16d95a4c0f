"""What a trained model is worth: zero-shot accuracy, retrieval recall and linear probes."""
