from drivetrain.plan.plan import Plan as Plan
from drivetrain.plan.registry import Entry as Entry
from drivetrain.plan.registry import Registry as Registry
