-- The first of the chain of retries that each decision ends. A chain that leads in circles has none: its rewards stay orphans.
with recursive links as (
    select decision_id, min(parent) as parent from read_parquet($files) where parent is not null group by decision_id
),

chain (decision_id, root, depth) as (
    select decision_id, parent, 1 from links
    union all
    select c.decision_id, l.parent, c.depth + 1
    from chain as c
    inner join links as l on l.decision_id = c.root
    where c.depth < 100
)

select decision_id, case when max(depth) < 100 then arg_max(root, depth) else '' end as root
from chain
group by decision_id
