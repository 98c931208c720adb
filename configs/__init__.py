"""The recipes that ship with quietvit: data files, read with importlib.resources.files("quietvit.configs")."""
