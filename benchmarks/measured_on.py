"""What stands beside a figure: command, date and machine."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loop_singular_bit.machine import processor_name, usable_cpus


def provenance(command: str) -> str:
    today = datetime.date.today().isoformat()
    return f"`{command}`, {today}, {processor_name()}, {usable_cpus()} cores."
