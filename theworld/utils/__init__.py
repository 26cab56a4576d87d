"""Files, devices, processes, signals, the console and the hub: for every other package."""
