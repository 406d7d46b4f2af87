from drivetrain_offload.file_io import (
    AsyncFile as AsyncFile,
)
from drivetrain_offload.file_io import (
    FileIOError as FileIOError,
)
from drivetrain_offload.file_io import (
    Request as Request,
)
from drivetrain_offload.file_io import (
    aligned_empty as aligned_empty,
)
from drivetrain_offload.memory import (
    MemoryRow as MemoryRow,
)
from drivetrain_offload.memory import (
    memory_table as memory_table,
)
from drivetrain_offload.memory import (
    memory_text as memory_text,
)
from drivetrain_offload.on_demand.states import (
    StateKind as StateKind,
)
from drivetrain_offload.on_demand.states import (
    offload_states as offload_states,
)
from drivetrain_offload.on_demand.states import (
    reload_states as reload_states,
)
from drivetrain_offload.on_demand.states import (
    state_devices as state_devices,
)
