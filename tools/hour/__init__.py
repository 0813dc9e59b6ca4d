"""The parts of `tools/first_hour.py`: what is carried, how a stage runs and is judged, and the stages themselves."""
