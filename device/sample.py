"""Sensor -> row: everything that is due at one moment is one row with one sequence number."""

from sensors import simulated


class Sampler:
    """Reads all sensors once a period. Periods that were missed are counted, not made up for."""

    def __init__(self, names, period_ms):
        self._sensors = [_sensor(name) for name in names]
        self._period_ms = period_ms
        self._due_ms = 0
        self.missed = 0

    def channels(self):
        """[name, unit, scale, sensor, kind] of each column."""
        columns = []
        for sensor in self._sensors:
            for name, unit, scale, kind in sensor.channels:
                columns.append([name, unit, scale, sensor.name, kind])
        return columns

    def due_in(self, uptime_ms):
        """Milliseconds until the next row is due; 0 or less: now."""
        return self._due_ms - uptime_ms

    def row(self, uptime_ms):
        """The values of this moment: a scaled integer each, or why there is none."""
        late = (uptime_ms - self._due_ms) // self._period_ms
        self.missed += late
        self._due_ms += (late + 1) * self._period_ms
        values = []
        for sensor in self._sensors:
            try:
                values.extend(sensor.read(uptime_ms))
            except Exception:  # a sensor that fails is noted in the row, and costs the others nothing
                values.extend(["fault"] * len(sensor.channels))
        return values


def _sensor(name):
    kind, _, which = name.partition(":")
    if kind != "simulated" or which not in simulated.KINDS:
        raise ValueError("no such sensor: %s" % name)
    return simulated.KINDS[which]()
