"""The verbs of the command line: the module that runs each, and one line of help."""

VERBS = {
    "sample": ("sagl.commands.sample", "draw images from a network, guided or not"),
    "fit": ("sagl.commands.fit", "train a network"),
    "validate": ("sagl.commands.validate", "loss and bits/dim of a network on validation images"),
    "test": ("sagl.commands.test", "the same on images that neither training nor validation saw"),
    "shard": ("sagl.commands.shard", "pictures as WebDataset shards, to train on"),
    "evaluate": ("sagl.commands.evaluate", "FID, sFID, IS, precision, recall, KID of images"),
    "statistics": ("sagl.commands.statistics", "a file to measure from, of a reference's images"),
    "compare": ("sagl.commands.compare", "runs side by side: settings, numbers, images at equal ids"),
    "convert": ("sagl.commands.convert", "a network as safetensors or for diffusers"),
    "doctor": ("sagl.commands.doctor", "what this machine has, and what is missing"),
    "completion": ("sagl.commands.completion", "completion of verbs and flags for your shell"),
    "export": ("sagl.commands.export", "grid, images or npz from the shards of a run"),
}
