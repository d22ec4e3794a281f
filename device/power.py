"""Reset cause and watchdog, where there are any; a computer has neither."""

try:
    import machine
except ImportError:
    machine = None


def reset_cause():
    """A short word for why the board started."""
    if machine is None or not hasattr(machine, "reset_cause"):
        return "start"
    cause = machine.reset_cause()
    for name in ("PWRON_RESET", "HARD_RESET", "WDT_RESET", "DEEPSLEEP_RESET", "SOFT_RESET"):
        if getattr(machine, name, None) == cause:
            return name.split("_")[0].lower()
    return str(cause)
