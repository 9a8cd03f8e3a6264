"""An image folder and a timm name -> a checkpoint folder."""
