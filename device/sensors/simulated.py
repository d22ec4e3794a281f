"""Sensors that are not there: series as a greenhouse has them, with the odd failed read."""

import math
import random


class Climate:
    """Temperature, humidity and pressure over a day, with noise; one read in 200 fails with `crc`."""

    name = "simulated"
    # name, SenML unit, scale (value / scale is in the unit), kind
    channels = (
        ("temperature", "Cel", 100, "gauge"),
        ("humidity", "%RH", 10, "gauge"),
        ("pressure", "Pa", 1, "gauge"),
    )

    def __init__(self, day_ms=86400000):
        self._day_ms = day_ms
        self._phase = random.random()
        self._drift = 0.0

    def read(self, uptime_ms):
        """One value a channel: a scaled integer, or why there is none."""
        day = math.sin(2 * math.pi * (uptime_ms / self._day_ms + self._phase))
        self._drift = 0.99 * self._drift + random.uniform(-0.05, 0.05)
        temperature = 21.0 + 6.0 * day + self._drift
        humidity = min(100.0, max(0.0, 58.0 - 2.2 * (temperature - 21.0) + random.uniform(-0.4, 0.4)))
        pressure = 101325 + 400.0 * self._drift + random.uniform(-6, 6)
        values = [int(temperature * 100), int(humidity * 10), int(pressure)]
        if random.random() < 0.005:
            values[1] = "crc"
        return values


KINDS = {"climate": Climate}
