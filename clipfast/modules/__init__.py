"""Drop-in towers and losses as `torch.nn.Module`s."""
