# Run by MicroPython before main.py, and never updated: nothing here may keep a board from starting.
import gc

gc.collect()
