"""What the engine costs on a GPU: transfers beside bare copies, stages beside the same work in a loop."""
