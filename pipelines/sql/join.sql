-- What became of one reward of every decision: a pure function of a set of decisions and a set of observations.
--
-- decisions(row, decision_id, decided_at_ns)
-- rewards(place, attributed_id, name, observed_at_ns, value, event, version, alone): `place` orders them by time, then event id; `event`
--     numbers event ids, and `version` the values that one came with; `alone` is true where a decision has no other observation of
--     that name: most have one, and need no grouping.
-- $least, $high: the range of an observation; $low, $high: that of what they add up to; $reversible: whether a negative one takes
--     back an earlier one.
--
-- Words that DuckDB, SQLite and Spark share, but for `sum(... order by ...)`: Spark sums unordered, to the last bits.
with judged as (
    select
        d.row,
        d.decided_at_ns,
        r.place,
        r.event,
        r.version,
        r.value,
        coalesce(r.alone, true) as alone,
        r.observed_at_ns - d.decided_at_ns as delay,
        case
            when r.place is null then null
            when r.value < $least or r.value > $high then 2
            when r.observed_at_ns - d.decided_at_ns > $window_ns then 1
            when r.observed_at_ns - d.decided_at_ns < -$tolerance_ns then 1
            else 0
        end as judgement  -- null: no observation; 0 counts, 1 outside the window, 2 out of range
    from decisions as d
    left join rewards as r on r.attributed_id = d.decision_id and r.name = $name
),

events as (
    select row, event, min(version) as first_version, max(version) as last_version
    from judged
    where not alone and judgement = 0
    group by row, event
),

settled as (
    select
        j.row,
        j.decided_at_ns,
        j.place,
        j.value,
        j.delay,
        case
            when j.judgement > 0 or e.first_version = e.last_version then j.judgement
            when $conflict = 'exclude' then 3
            when $conflict = 'first' and j.version > e.first_version then 4
            when $conflict = 'last' and j.version < e.last_version then 4
            else 0
        end as judgement,  -- 3 contradicted by another value of its event id that would count, 4 outvoted by the rule
        case when j.judgement = 0 and j.version = e.first_version and e.last_version > e.first_version then 1 else 0 end as contradicted
    from judged as j
    left join events as e on e.row = j.row and e.event = j.event
    where not j.alone
),

summed as (
    select
        row,
        decided_at_ns,
        min(case when judgement = 0 then place end) as first_place,
        max(case when judgement = 0 then place end) as last_place,
        min(case when judgement = 0 then value end) as least_value,
        max(case when judgement = 0 then value end) as most_value,
        sum(case when judgement = 0 then value end order by place) as total_value,
        min(case when judgement = 0 then delay end) as delay,
        cast(sum(case when judgement = 0 then 1 else 0 end) as integer) as events,
        cast(sum(case when judgement = 0 and delay < 0 then 1 else 0 end) as integer) as early,
        cast(sum(case when judgement = 1 then 1 else 0 end) as integer) as late,
        cast(sum(case when judgement = 2 then 1 else 0 end) as integer) as refused,
        cast(sum(contradicted) as integer) as conflicts,
        cast(sum(case when judgement = 0 and value < 0 and $reversible then 1 else 0 end) as integer) as reversed,
        max(case when judgement = 3 then 1 else 0 end) as in_conflict
    from settled
    group by row, decided_at_ns
),

outcomes as (
    select
        row,
        decided_at_ns,
        case when judgement = 0 then value end as aggregate,
        case when judgement = 0 then delay end as delay,
        case when judgement = 0 then 1 else 0 end as events,
        case when judgement = 0 and delay < 0 then 1 else 0 end as early,
        case when judgement = 1 then 1 else 0 end as late,
        case when judgement = 2 then 1 else 0 end as refused,
        0 as conflicts,
        case when judgement = 0 and value < 0 and $reversible then 1 else 0 end as reversed,
        0 as in_conflict
    from judged
    where alone
    union all
    select
        s.row,
        s.decided_at_ns,
        case
            when $aggregation in ('first', 'last') then p.value
            when $aggregation = 'sum' then s.total_value
            when $aggregation = 'min' then s.least_value
            else s.most_value
        end as aggregate,
        s.delay, s.events, s.early, s.late, s.refused, s.conflicts, s.reversed, s.in_conflict
    from summed as s
    left join rewards as p on p.place = case when $aggregation = 'first' then s.first_place else s.last_place end
)

select
    row,
    case
        when decided_at_ns + $window_ns > $cutoff_ns then null
        when in_conflict = 1 then null
        when events > 0 and (aggregate < $low or aggregate > $high) then null
        when events > 0 then aggregate
        else $fallback
    end as value,
    case
        when decided_at_ns + $window_ns > $cutoff_ns then 'pending'
        when in_conflict = 1 then 'conflict'
        when events > 0 and (aggregate < $low or aggregate > $high) then 'conflict'
        when events > 0 then 'observed'
        when $fallback is null then 'unknown'
        else 'default'
    end as state,
    delay,
    events,
    early,
    late,
    refused,
    conflicts,
    reversed
from outcomes
