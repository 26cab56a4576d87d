"""What every other package rests on: files, devices, processes, signals, the console and the hub's folders."""
