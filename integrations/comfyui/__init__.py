"""var-deploy's bundles as nodes of ComfyUI: link or copy this folder into `custom_nodes`.

ComfyUI imports the folder and reads the two names below.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
