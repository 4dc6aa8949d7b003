"""The runs being steered: tasks, populations, telemetry, signals, levers and the guard."""
