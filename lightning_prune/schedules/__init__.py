"""Schedules: how much is removed, and when."""

from lightning_prune.schedules.base import Event, Schedule, Timetable
from lightning_prune.schedules.curves import Cubic, Exponential, Linear, OneShot, Ramp, Steps

__all__ = ["Cubic", "Event", "Exponential", "Linear", "OneShot", "Ramp", "Schedule", "Steps", "Timetable"]
