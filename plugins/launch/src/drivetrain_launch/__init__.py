"""Jobs on several hosts: who takes part, how they are started, and what is shown of them."""
