"""Schedules: the share of the target that is removed at each point of training."""

from lightning_prune.schedules.base import Event, Schedule, Timetable
from lightning_prune.schedules.curves import Cubic, Exponential, Linear, OneShot, Ramp, Steps

__all__ = ["Cubic", "Event", "Exponential", "Linear", "OneShot", "Ramp", "Schedule", "Steps", "Timetable"]
