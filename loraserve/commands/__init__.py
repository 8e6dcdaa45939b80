"""The subcommands of `loraserve`. Each module adds its parser and runs it."""
