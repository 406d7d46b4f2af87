from drivetrain.job.job import Job as Job
from drivetrain.job.job import init_distributed as init_distributed
