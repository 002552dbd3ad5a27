"""What `make bench` runs: the comparison with Hugging Face PEFT."""

from __future__ import annotations

import sys

from benchmarks.peft_comparison import main

if __name__ == "__main__":
    sys.exit(main())
