"""Sizing a deployment: workloads, what users of one would see, and the simulator's command line.

workload.py makes traces (who asks when, how much is trained), metrics.py turns what happened into figures, plot.py draws them,
cli.py is `python -m loquetier_core simulate`. benchmarks/unified.py replays the same traces against a real engine.
"""
