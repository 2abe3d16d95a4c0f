"""What a trained model is worth: retrieval recall and zero-shot accuracy."""
