"""From what a user passes to columns, episodes and spaces; each step is called once, in this order.

``source.open_columns``: one reader a format opens the columns, by their names in the source.
``columns.name_columns``: columns by our names, each with one checked row a step; texts as numbers.
``boundaries.find_episodes``: rows in the order of episodes (``ends``: flags, gaps of time, autoresets);
``contradictions`` and ``hints`` only warn.
``guess``: the spaces that neither the source, the user nor the environment declares.
``data.build.build``: chunks of transitions, converted, checked, measured, written to memory or disk.
"""
