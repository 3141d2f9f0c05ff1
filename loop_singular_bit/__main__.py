"""`python -m loop_singular_bit` is the command `loop-singular-bit`."""

from loop_singular_bit.cli import main

raise SystemExit(main())
