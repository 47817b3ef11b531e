"""Subcommands: the module of each, and one line of help."""

SUBCOMMANDS = {
    "sample": ("sagl.commands.sample", "sample images from a diffusion model, with or without guidance"),
    "playground": ("sagl.commands.playground", "try guidance on a page in the browser"),
    "fit": ("sagl.commands.fit", "train a diffusion model or a classifier"),
    "validate": ("sagl.commands.validate", "loss and bits/dim of a network on validation images"),
    "test": ("sagl.commands.test", "loss and bits/dim of a network on test images"),
    "shard": ("sagl.commands.shard", "write images as WebDataset shards, to train on"),
    "evaluate": ("sagl.commands.evaluate", "FID, sFID, IS, precision, recall and KID of images"),
    "statistics": ("sagl.commands.statistics", "write the statistics of reference images to a file"),
    "tune": ("sagl.commands.tune", "search for guidance settings of a network"),
    "compare": ("sagl.commands.compare", "compare runs: settings, metrics, images of equal ids"),
    "analyze": ("sagl.commands.analyze", "figures of the paper's analyses: attention, frequency, overlap, …"),
    "reproduce": ("sagl.commands.reproduce", "tables and figures of the paper, and their report"),
    "convert": ("sagl.commands.convert", "convert a network to safetensors or diffusers"),
    "push": ("sagl.commands.push", "upload a network to the Hugging Face Hub, with a model card"),
    "doctor": ("sagl.commands.doctor", "report the machine, libraries and data"),
    "completion": ("sagl.commands.completion", "print the completion script of a shell"),
    "export": ("sagl.commands.export", "write a grid, images or an npz file from a run's shards"),
}
