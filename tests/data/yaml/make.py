"""Makes scalars.json beside it: what OmegaConf makes of each line of scalars.txt; needs omegaconf (2.4.0 was used).

python make.py
"""

import json
import math
import tempfile
from pathlib import Path

from omegaconf import OmegaConf


def recorded(text: str) -> dict[str, str]:
    """Type and text of the value, or that the file is refused."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(f"value: {text}\n")
        file.flush()
        try:
            value = OmegaConf.to_container(OmegaConf.load(file.name))["value"]
        except Exception:
            return {"type": "refused"}
    shown = "nan" if isinstance(value, float) and math.isnan(value) else repr(value)
    return {"type": type(value).__name__, "value": shown}


HERE = Path(__file__).parent

forms = (HERE / "scalars.txt").read_text().splitlines()
(HERE / "scalars.json").write_text(json.dumps({form: recorded(form) for form in forms}, indent=1) + "\n")
