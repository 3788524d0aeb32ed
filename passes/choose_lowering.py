"""placeholder"""
BY_CHANNEL=("channels","groups")
KEY="dv.lowering"
def lowering_of(node):
    return node.metadata_props.get(KEY,"masked")
