"""Library code sets no state of the process: tools and the trainer do, through functions of theworld/utils."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent / "theworld"
SETS = re.compile(
    r"torch\.set_|torch\.backends\.|cuda\.set_device|torch\.manual_seed|np\.random\.seed|random\.seed\("
    r"|os\.environ\[[^]]*\] = |os\.environ\.(?:setdefault|update)|os\.putenv|warnings\.filterwarnings"
    r"|_(?:dynamo|inductor)\.config\.\w+ = |setswitchinterval|os\.chdir|os\.umask"
)
# set_up_torch; what a tool sets as it starts; the processes that read photographs, which are its own.
ALLOWED = {"utils/device.py", "utils/console.py", "extraction/reading.py"}


def test_only_the_functions_that_are_for_it_set_state_of_the_process() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(SETS.search(line) for line in path.read_text().splitlines())
    }
    assert found == ALLOWED
